"""Recipes: what is read is what was written, and everything else is refused by the name of its key."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from umr_plugins.errors import InputError
from umr_plugins.training.reading import make_recipe, read_recipe
from umr_plugins.training.recipe import FREE, Recipe, Source

LEAST: dict[str, Any] = {"model": "gme-2b", "data": [{"path": "train.jsonl"}]}

# Every key, none with its default. Steps and epochs exclude one another, so epochs are tried apart.
FULL: dict[str, Any] = {
    "model": "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct",
    "data": [
        {"path": "/data/a.jsonl", "format": "captions", "options": {"name": "own", "deep": {"a": [1, None]}}},
        {"path": "/data/mbeir", "format": "mbeir", "options": {"split": "train"}},
    ],
    "revision": "v1",
    "steps": 1000,
    "weights": {"classes": {"single": 1.0, "fused": 2.5}, "sources": {"own": 0.25}},
    "batch": {"pictures": 16, "text": 64, "same_source": False},
    "negatives": 0,
    "loss": {
        "temperature": 0.05,
        "learn_temperature": True,
        "in_batch": False,
        "same_source_only": True,
        "query_query": True,
        "document_document": True,
        "false_negative_margin": -0.1,
        "matryoshka": {"64": 1.0, "256": 0.5},
        "distillation": 0.2,
        "teacher_temperature": 2.0,
    },
    "tuning": "full",
    "lora": {"rank": 4, "alpha": 9, "dropout": 0.0, "targets": ["q_proj", "v_proj"], "vision": True},
    "full_vision": True,
    "optimizer": {
        "learning_rate": 2e-5,
        "warmup": 0.0,
        "weight_decay": 0.01,
        "betas": [0.8, 0.95],
        "epsilon": 1e-6,
        "max_grad_norm": 0.5,
    },
    "memory": {
        "chunk_tokens": 100,
        "chunk_entries": 7,
        "feature_bytes": 0,
        "checkpointing": True,
        "loss_rows": 5,
    },
    "max_image_tokens": 256,
    "min_image_tokens": 4,
    "max_length": 900,
    "max_text_length": 128,
    "precision": "float32",
    "device": "cpu",
    "seed": 2**32 - 1,
    "save_every": 10,
    "keep": 1,
    "log_every": 2,
    "max_skipped": 1,
    "tensorboard": True,
    "trainer": {"fsdp": "full_shard", "ddp_timeout": 60},
}  # fmt: skip


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def made(**changes: Any) -> Recipe:
    return make_recipe({**LEAST, **changes}, Path("/data"))


def refused(raw: object) -> str:
    with pytest.raises(InputError) as caught:
        make_recipe(raw, Path("/data"), "mine.yaml")
    message = str(caught.value)
    assert message.startswith("mine.yaml: ")
    return message


def nested(key: str, value: object) -> dict[str, Any]:
    """A recipe with one value at a dotted key; `data` stands for its first source."""
    raw: dict[str, Any] = json.loads(json.dumps(LEAST))
    *parents, last = key.split(".")
    at: Any = raw
    for parent in parents:
        at = at["data"][0] if parent == "data[0]" else at.setdefault(parent, {})
    at[last] = value
    return raw


def leaves(kind: Any = Recipe, at: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Dotted key, type and whether it may be null, of every value a recipe has."""
    for name, hint in typing.get_type_hints(kind).items():
        parts = [part for part in typing.get_args(hint) if part is not types.NoneType]
        optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
        inner = parts[0] if optional and len(parts) == 1 else hint
        yield f"{at}{name}", inner, optional
        if dataclasses.is_dataclass(inner):
            yield from leaves(inner, f"{at}{name}.")
        elif inner == list[Source]:
            yield from leaves(Source, f"{at}{name}[0].")


LEAVES = list(leaves())


def of(value: Any, key: str) -> Any:
    for part in key.split("."):
        value = getattr(value, part) if part != "data[0]" else value.data[0]
    return value


# --- what is read -------------------------------------------------------------------------------------------


def test_the_tests_know_every_key_and_change_it() -> None:
    full, least = make_recipe(FULL, Path("/data")), make_recipe(LEAST, Path("/data"))
    keys = [key for key, kind, _ in LEAVES if not dataclasses.is_dataclass(kind) and key != "epochs"]
    assert len(keys) > 45
    assert [key for key in keys if of(full, key) == of(least, key)] == []


def test_a_recipe_survives_yaml_and_json(tmp_path: Path) -> None:
    full = make_recipe(FULL, Path("/data"))
    assert full.as_dict() == {**FULL, "epochs": None}
    assert make_recipe(full.as_dict(), tmp_path) == full
    assert make_recipe(json.loads(json.dumps(full.as_dict())), tmp_path) == full
    assert read_recipe(write(tmp_path, yaml.safe_dump(full.as_dict()))) == full
    assert full.loss.matryoshka == {64: 1.0, 256: 0.5}
    assert full.data[1] == Source("/data/mbeir", "mbeir", {"split": "train"})


def test_keys_of_dimensions_are_numbers_or_their_digits() -> None:
    assert made(loss={"matryoshka": {64: 1}}) == made(loss={"matryoshka": {"64": 1.0}})


def test_the_defaults_are_those_of_the_paper() -> None:
    least = made()
    assert (least.lora.rank, least.optimizer.learning_rate, least.optimizer.warmup) == (8, 1e-4, 0.06)
    assert (least.loss.temperature, least.max_image_tokens, least.max_length) == (0.03, 1024, 1800)
    assert (least.batch.pictures, least.batch.text, least.max_text_length) == (128, 512, 512)
    assert (least.steps, least.epochs, least.negatives, least.tuning) == (None, None, None, "lora")


@pytest.mark.parametrize(
    ("written", "value"), [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("1E-4", 1e-4), ("1", 1.0), ("'0.5'", 0.5)]
)
def test_numbers_may_be_written_as_people_write_them(tmp_path: Path, written: str, value: float) -> None:
    path = write(tmp_path, f"model: m\ndata: [{{path: a}}]\noptimizer: {{learning_rate: {written}}}\n")
    rate = read_recipe(path).optimizer.learning_rate
    assert (rate, type(rate)) == (value, float)


def test_paths_start_from_the_folder_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes/base").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(elsewhere))
    data = "[{path: train.jsonl}, {path: ../b.jsonl}, {path: /c.jsonl}, {path: ~/d.jsonl}]"
    path = write(tmp_path / "recipes", f"model: base\ndata: {data}\n")
    expected = [
        str(tmp_path / "recipes/train.jsonl"),
        str(tmp_path / "recipes/../b.jsonl"),
        "/c.jsonl",
        str(elsewhere / "d.jsonl"),
    ]
    for here, given in ((elsewhere, path), (tmp_path, Path("recipes/recipe.yaml")), (elsewhere, str(path))):
        monkeypatch.chdir(here)
        recipe = read_recipe(given)
        assert [source.path for source in recipe.data] == expected
        assert recipe.model == str(tmp_path / "recipes/base")


def test_a_model_that_is_no_folder_beside_the_recipe_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "gme-2b.txt").touch()
    assert make_recipe(LEAST, tmp_path).model == "gme-2b"
    (tmp_path / "gme-2b").touch()
    assert make_recipe(LEAST, tmp_path).model == "gme-2b"


def test_anchors_of_yaml_work(tmp_path: Path) -> None:
    text = (
        "model: m\n"
        "data:\n"
        "- {path: a, options: {deep: &deep {<<: &base {x: 1, y: 2}, x: 3}}}\n"
        "- {path: b, options: {<<: *deep, z: 4}}\n"
    )
    recipe = read_recipe(write(tmp_path, text))
    assert recipe.data[1].options == {"x": 3, "y": 2, "z": 4}


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("modle", "model"),
        ("batches", "batch"),
        ("data[0].pth", "path"),
        ("weights.class", "classes"),
        ("batch.picture", "pictures"),
        ("loss.temprature", "temperature"),
        ("lora.ranks", "rank"),
        ("optimizer.lerning_rate", "learning_rate"),
        ("memory.chunk_token", "chunk_tokens"),
    ],
)
def test_an_unknown_key_is_named_with_the_one_that_was_meant(key: str, meant: str) -> None:
    message = refused(nested(key, 1))
    assert f"unknown key {key}; allowed are " in message
    assert message.endswith(f"; did you mean {meant!r}?")
    assert f"{meant}, " in message or f", {meant}" in message


@pytest.mark.parametrize("key", ["zzzz", "lora.zzzz", "data[0].zzzz"])
def test_an_unknown_key_like_no_other_is_named_with_those_allowed(key: str) -> None:
    assert f"unknown key {key}; allowed are " in (message := refused(nested(key, 1)))
    assert "did you mean" not in message


@pytest.mark.parametrize("key", [5, None, True, 1.5])
def test_a_key_that_is_no_text_is_refused(key: object) -> None:
    assert f"unknown key {key}; allowed are model, data" in refused({**LEAST, key: 1})


WRONG: dict[Any, list[Any]] = {
    int: ["3", "many", 1.5, 2.0, True, [1], {}],
    float: ["much", "", True, [1.0], {}, 10**400],
    str: [3, 1.5, True, ["a"], {}],
    bool: [0, 1, "true", "maybe", []],
    list[str]: ["q_proj", {"q_proj": 1}, 3, [3], [None], [["a"]]],
    list[float]: [0.9, {"a": 1}, ["x", 0.9], [None, 0.9], [True, 0.9]],
    list[Source]: ["train.jsonl", {"path": "a"}, ["train.jsonl"], [None], [["a"]]],
    dict[str, Any]: [[], "x", 3, {1: 2}, {None: 1}],
    dict[str, float]: [[], "x", 3, {"a": "much"}, {"a": None}, {"a": True}, {1: 1.0}],
    dict[int, float]: [[], "x", 3, {64: "much"}, {64: None}, {"wide": 1.0}, {1.5: 1.0}, {True: 1.0}],
}


@pytest.mark.parametrize(("key", "kind", "optional"), LEAVES, ids=[key for key, _, _ in LEAVES])
def test_a_value_of_another_type_is_refused_by_its_key(key: str, kind: Any, optional: bool) -> None:
    if dataclasses.is_dataclass(kind):
        wrong = [[], "x", 3, True]
    elif typing.get_origin(kind) is typing.Literal:
        wrong = ["", "Full", 3, True, [], {}]
    else:
        wrong = WRONG[kind]
    for value in [*wrong, *([] if optional else [None])]:
        message = refused(nested(key, value))
        assert message.startswith(f"mine.yaml: {key}"), (value, message)
        assert " must be " in message, (value, message)
        assert ", got " in message, (value, message)
        assert "None" not in message, (value, message)
    if optional:
        assert of(make_recipe(nested(key, None), Path("/data")), key) is None


def test_what_was_given_is_shown_shortened() -> None:
    assert refused(nested("lora.rank", "x" * 1000)).endswith("'" + "x" * 78 + "…")
    assert refused(nested("tuning", "qlora")).endswith("tuning must be 'lora' or 'full', got 'qlora'")
    assert refused(nested("lora", None)).endswith("lora must be a mapping of keys to values, got nothing")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("key", "bad", "good", "words"),
    [
        *[
            (key, (0, -1, 2**31), (1,), "at least 1 and at most")
            for key in (
                "batch.pictures", "batch.text", "lora.rank", "memory.chunk_tokens", "memory.chunk_entries",
                "memory.loss_rows", "max_image_tokens", "min_image_tokens", "max_length", "max_text_length",
                "save_every", "keep", "log_every", "max_skipped",
            )
        ],
        ("steps", (0, -5, 10**7 + 1), (1, 10**7), "at least 1 and at most 10,000,000"),
        ("negatives", (-1,), (0, 20), "at least 0"),
        ("seed", (-1, 2**32), (0, 2**32 - 1), "at least 0 and at most 4,294,967,295"),
        ("epochs", (0, -1, NAN, INF), (0.1, 3), "above 0"),
        ("loss.temperature", (0, -1, NAN, INF, 101), (0.001, 100), "above 0 and at most 100"),
        ("loss.distillation", (-0.1, NAN, INF), (0, 1), "at least 0"),
        ("loss.teacher_temperature", (0, NAN, INF), (1,), "above 0"),
        ("loss.false_negative_margin", (NAN, INF, -INF), (0, -0.5, 0.1), "a finite number"),
        ("loss.matryoshka", ({0: 1}, {64: 0}, {64: -1}, {64: NAN}, {64: INF}), ({1: 0.1},), "above 0"),
        ("lora.alpha", (0, -1), (1,), "above 0"),
        ("lora.dropout", (-0.1, 1, NAN), (0, 0.9), "at least 0 and at most 0.999"),
        ("optimizer.learning_rate", (0, -1, NAN, INF, 11), (1e-9, 1), "above 0 and at most 10"),
        ("optimizer.warmup", (-0.1, 1.1, NAN), (0, 1), "at least 0 and at most 1"),
        ("optimizer.weight_decay", (-1, NAN, 11), (0, 0.1), "at least 0 and at most 10"),
        ("optimizer.betas", ([], [0.9], [0.9, 1], [-0.1, 0.9], [0.9, NAN], [0, 0, 0]), ([0, 0.999],), "two"),
        ("optimizer.epsilon", (0, NAN, 2), (1e-12,), "above 0 and at most 1"),
        ("optimizer.max_grad_norm", (0, -1, NAN, INF), (0.1,), "above 0"),
        ("memory.feature_bytes", (-1, 2**60), (0, 2**40), "at least 0"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_with_the_range(
    key: str, bad: tuple[Any, ...], good: tuple[Any, ...], words: str
) -> None:
    for value in bad:
        message = refused(nested(key, value))
        assert message.startswith(f"mine.yaml: {key} ")
        assert words in message
        assert ", got " in message
    for value in good:
        assert of(make_recipe(nested(key, value), Path("/data")), key) == value


@pytest.mark.parametrize("value", [NAN, INF, "!!timestamp 2024-01-01", {"a": {1: 2, "b": 3}}, {2, 3}, b"raw"])
@pytest.mark.parametrize("key", ["data[0].options", "trainer"])
def test_what_json_can_not_say_is_refused(key: str, value: Any) -> None:
    if isinstance(value, str):
        value = yaml.safe_load(value)
    assert "options and trainer take texts, finite numbers" in refused(nested(key, {"x": value}))


def test_a_recipe_that_holds_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="options and trainer take"):
        read_recipe(write(tmp_path, "model: m\ndata: [{path: a}]\ntrainer: &a {x: *a}\n"))


def test_steps_exclude_epochs() -> None:
    assert "give steps or epochs, not both" in refused({**LEAST, "steps": 3, "epochs": 1.0})


@pytest.mark.parametrize("key", ["model", "data"])
def test_model_and_data_are_needed(key: str) -> None:
    raw = {name: value for name, value in LEAST.items() if name != key}
    assert f"the key {key} is missing" in refused(raw)


def test_data_are_needed_with_their_paths() -> None:
    assert "data is an empty list; name at least one file or folder" in refused({**LEAST, "data": []})
    sources = [{"path": "a"}, {"format": "rows"}]
    assert "the key data[1].path is missing" in refused({**LEAST, "data": sources})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a recipe must be a mapping of keys to values, got nothing"),
        ("- model: m\n", r"a recipe must be a mapping of keys to values, got \[\{'model': 'm'\}\]"),
        ("just words\n", "a recipe must be a mapping of keys to values, got 'just words'"),
        ("model: [m\n", "can't be read as a recipe, which is a file of YAML in UTF-8: .*line 2"),
        ("model: m\n\tdata: x\n", "can't be read as a recipe.*line 2"),
        (b"model: \xff\n", "can't be read as a recipe, which is a file of YAML in UTF-8: .*0xff"),
        (b"model: a\0b\n", "can't be read as a recipe"),
        ("model: m\nsteps: 3\nsteps: 4\n", "the key 'steps' is given twice.*line 3"),
        ("model: m\nlora: {rank: 1, alpha: 3, rank: 2}\n", "the key 'rank' is given twice.*line 2"),
        ("model: !!python/object/apply:os.getcwd []\n", "can't be read as a recipe"),
        ("model: 2024-13-45\n", "can't be read as a recipe.*month"),
        ("[" * 1000, "can't be read as a recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_its_name(
    tmp_path: Path, text: str | bytes, words: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=f"(?s){path}.*{words}"):
        read_recipe(path)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no recipe .*none\.yaml"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(InputError, match=f"{tmp_path} can't be read as a recipe.*directory"):
        read_recipe(tmp_path)


def test_the_home_of_nobody_is_refused() -> None:
    assert "home" in refused({**LEAST, "data": [{"path": "~nobody-of-this-name/a.jsonl"}]})


# --- its hash -----------------------------------------------------------------------------------------------


def with_value(recipe: Any, key: str, value: Any) -> Any:
    """The recipe with one value changed, past all checks."""
    first, _, rest = key.partition(".")
    if first == "data[0]":
        return dataclasses.replace(recipe, data=[with_value(recipe.data[0], rest, value), *recipe.data[1:]])
    inner = with_value(getattr(recipe, first), rest, value) if rest else value
    return dataclasses.replace(recipe, **{first: inner})


def test_the_hash_changes_with_every_key_but_the_free_ones() -> None:
    base, full = (
        make_recipe(LEAST, Path("/data")),
        make_recipe({**FULL, "steps": None, "epochs": 3.0}, Path("/data")),
    )
    full = dataclasses.replace(full, steps=7)
    unchanged = set()
    hashes = []
    for key, kind, _ in LEAVES:
        if not dataclasses.is_dataclass(kind):
            changed = with_value(base, key, of(full, key))
            assert changed != base
            if changed.sha256() == base.sha256():
                unchanged.add(key)
            else:
                hashes.append(changed.sha256())
    assert FREE == {"save_every", "keep", "log_every", "tensorboard", "max_skipped", "device", "memory"}
    assert unchanged == {
        key for key, kind, _ in LEAVES if key.partition(".")[0] in FREE and not dataclasses.is_dataclass(kind)
    }
    assert len(set(hashes)) == len(hashes)


def test_the_hash_is_of_values_alone() -> None:
    turned = dict(reversed(list(FULL.items())))
    turned["loss"] = {**FULL["loss"], "matryoshka": {256: 0.5, 64: 1}}
    full = make_recipe(FULL, Path("/data"))
    assert make_recipe(turned, Path("/elsewhere"), "other.yaml").sha256() == full.sha256()
    code = (
        "import json, sys; from pathlib import Path; from umr_plugins.training.reading import make_recipe\n"
        "print(make_recipe(json.load(sys.stdin), Path('/data')).sha256())\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(FULL), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == full.sha256()
