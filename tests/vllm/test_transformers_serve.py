"""transformers' own server, of a model that has a prefix."""


def test_it_answers_with_the_prefix_of_the_model_that_it_serves(transformers_serve):
    said = transformers_serve()
    assert said["attached"] == said["generate"] != said["before"] == said["detached"]


def test_its_continuous_batching_is_not_begun_with_a_prefix(transformers_serve):
    said = transformers_serve("batching")
    assert said["attached"].startswith(("500", "503"))  # the server keeps the reason to itself
    assert said["generate"]


def test_its_continuous_batching_refuses_a_prefix_that_comes_later(transformers_serve):
    said = transformers_serve("batching", "begun")
    assert not said["before"].startswith(("500", "503"))
    assert said["attached"].startswith("503")
    assert "would lose the prefix" in said["attached"]
