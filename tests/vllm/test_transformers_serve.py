"""transformers' own server, of a model that has a prefix."""


def test_it_answers_with_the_prefix_of_the_model_that_it_serves(transformers_serve):
    said = transformers_serve()
    assert said["attached"] == said["generate"] != said["before"] == said["detached"]


def test_its_continuous_batching_never_answers_without_the_prefix(transformers_serve):
    said = transformers_serve("batching")
    status, _, words = said["attached"].partition(": ")
    assert status in ("500", "503")
    assert "would lose" in words or status == "500"  # before 5.20 it keeps the reason to itself
    assert said["generate"]
