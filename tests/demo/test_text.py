"""The demo's text: what becomes a pair, what stays out, and the overlap score by hand."""

import ast
import textwrap

import pytest

from prefixattn.demo.text import (
    Library,
    Pair,
    library_root,
    overlap,
    parse,
    read_library,
    split_pairs,
)

SOURCE = textwrap.dedent(
    '''
    class Box:
        def put(self, thing):
            """Put a thing into the box.

            It must fit.
            """
            # the only comment
            self.things.append(thing)

    async def fetch(url):
        """Fetch one address."""
        return await get(url)

    def undocumented(x):
        return x

    def only_a_docstring():
        """Do nothing at all."""

    def one_line(): """Return seven now."""; return 7

    def one_word(x):
        """Abbreviated."""
        return x

    def foreign(x):
        """Gib die Größe zurück."""
        return x
    '''
)
MODULE = parse("box.py", SOURCE)


def test_pairs_are_the_documented_functions_with_a_body_of_their_own():
    assert list(MODULE.pairs) == [
        Pair(
            "box.py",
            "put",
            "def put(self, thing):\n    # the only comment\n    self.things.append(thing)",
            "Put a thing into the box.",
        ),
        Pair(
            "box.py",
            "fetch",
            "async def fetch(url):\n    return await get(url)",
            "Fetch one address.",
        ),
    ]


def test_documented_functions_keep_their_docstrings():
    texts = MODULE.documented
    assert texts[0].startswith('def put(self, thing):\n    """Put a thing into the box.\n')
    assert "undocumented" not in "".join(texts)


@pytest.fixture(scope="module")
def library() -> Library:
    return read_library(library_root())


def test_the_librarys_pairs_are_code_without_their_docstrings(library):
    train, held_out = library.split()
    training, testing = split_pairs(train, held_out)
    assert len(training) > 1000
    assert len(testing) > 100
    for pair in training + testing:
        function = ast.parse(pair.source).body[0]
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert function.name == pair.name
        assert ast.get_docstring(function) is None or pair.summary not in pair.source


def test_lines_left_of_the_function_stay_where_they_are():
    text = 'class A:\n    def f(self):\n        """Return some text."""\n        return """\nx"""\n'
    assert parse("a.py", text).pairs[0].source == 'def f(self):\n    return """\nx"""'


def test_no_file_and_no_source_is_on_both_sides(library):
    train, held_out = library.split()
    assert {module.path for module in train}.isdisjoint(module.path for module in held_out)
    assert len(train) + len(held_out) == len(library.modules)
    training, testing = split_pairs(train, held_out)
    assert {pair.path for pair in training}.isdisjoint(pair.path for pair in testing)
    assert {pair.source for pair in training}.isdisjoint(pair.source for pair in testing)


def test_reading_again_gives_the_same_in_the_same_order():
    folder = library_root() / "asyncio"
    assert read_library(folder) == read_library(folder)


def test_a_held_out_copy_of_a_training_function_is_left_out():
    copy = parse("copy.py", SOURCE)
    training, testing = split_pairs([MODULE], [copy])
    assert len(training) == 2
    assert testing == []


def test_tests_are_skipped_and_unreadable_files_are_named(tmp_path):
    for name, text in {
        "good.py": "x = 1\n",
        "broken.py": "def (:\n",
        "test/skipped.py": "x = 2\n",
        "pkg/inner.py": "x = 3\n",
    }.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    library = read_library(tmp_path)
    assert [module.path for module in library.modules] == ["good.py", "pkg/inner.py"]
    assert library.unreadable == ("broken.py",)


def test_a_folder_without_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"root: got .* holds no readable Python source"):
        read_library(tmp_path)


@pytest.mark.parametrize(
    ("candidate", "reference", "score"),
    [
        pytest.param("Return the size.", "Return the size.", 1.0, id="same"),
        pytest.param("RETURN the-size", "Return the size.", 1.0, id="case and punctuation"),
        pytest.param("Open a file", "Return the size", 0.0, id="nothing shared"),
        pytest.param("", "Return the size", 0.0, id="empty candidate"),
        pytest.param("Return", "", 0.0, id="empty reference"),
        # "the cat on the mat" and "the cat sat": subsequence "the cat", 2 * 2 / (5 + 3)
        pytest.param("the cat on the mat", "the cat sat", 0.5, id="prefix shared"),
        # "a c" of "a b c" and "c a c": 2 * 2 / (3 + 3); order counts
        pytest.param("a b c", "c a c", 2 / 3, id="order counts"),
        # a repeated word is matched once: 2 * 1 / (4 + 1)
        pytest.param("the the the the", "the", 0.4, id="repeats"),
    ],
)
def test_overlap_by_hand(candidate, reference, score):
    assert overlap(candidate, reference) == pytest.approx(score)
    assert overlap(reference, candidate) == pytest.approx(score)
