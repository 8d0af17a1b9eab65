"""Files, overrides, sections and the messages of everything that can be wrong with them."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.config import Source, build, explain, load_config, option, section, to_dict, to_toml, variant
from millrace.core.errors import UserError
from millrace.core.units import Duration
from millrace.pretrain.config import PretrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Sgd:
    kind: Literal["sgd"] = option("sgd", "which optimiser")
    lr: float = option(0.1, "learning rate")
    momentum: float = option(0.9, "of the running gradient")

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr = {self.lr}: must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Adam:
    kind: Literal["adam"] = option("adam", "which optimiser")
    lr: float = option(0.001, "learning rate")
    betas: list[float] = option([0.9, 0.95], "decay rates")


OPTIMIZERS = {"sgd": f"{__name__}:Sgd", "adam": f"{__name__}:Adam"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    size: int = option(64, "a size in bytes", unit="bytes")
    steps: int = option(10, "a count")


@dataclass(frozen=True, kw_only=True, slots=True)
class Root:
    name: str = option("x", "a name")
    flag: bool = option(False, "a switch")
    mode: Literal["fast", "slow"] = option("fast", "one of two")
    maybe: int | None = option(None, "may be unset")
    length: Duration = option(Duration(5, "steps"), "a duration")
    table: dict[str, Any] = option({}, "anything")
    names: list[str] = option([], "several names")
    optim: Any = variant(OPTIMIZERS, "sgd", "the optimiser")
    inner: Inner = section(Inner, "a nested section")


RECIPE = """\
# a comment, and an empty line

name = "first"
[optim]
kind = "sgd"
momentun = 0.8
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_a_misspelt_key_names_file_line_and_the_right_one(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE)
    with pytest.raises(UserError) as caught:
        load_config(Root, path)
    assert str(caught.value) == f"unknown key 'optim.momentun' in {path}:6; did you mean 'momentum'?"


def test_an_unknown_key_without_a_near_one_lists_what_there_is(tmp_path: Path) -> None:
    path = write(tmp_path, "[inner]\nzzz = 1\n")
    with pytest.raises(UserError) as caught:
        load_config(Root, path)
    assert str(caught.value) == f"unknown key 'inner.zzz' in {path}:2; known here: size, steps"


def test_a_misspelt_override_is_named_as_it_was_typed(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(Root, None, ["optim.momentun=0.8"])
    assert (
        str(caught.value) == "unknown key 'optim.momentun' in override 'optim.momentun=0.8'; did you mean 'momentum'?"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("name = 3", "name = 3 in FILE:1: expected a string, not int"),
        ("flag = 1", "flag = 1 in FILE:1: expected true or false, not int"),
        ("maybe = true", "maybe = True in FILE:1: expected a whole number, not bool"),
        ("maybe = 1.5", "maybe = 1.5 in FILE:1: expected a whole number, not float"),
        ('mode = "slw"', "mode = 'slw' in FILE:1: expected one of 'fast', 'slow'; did you mean 'slow'?"),
        (
            "length = 5",
            "length in FILE:1: cannot read 5 as a duration; write '2k steps', '1B tokens', '2 epochs' or '30 min'",
        ),
        ("table = 1", "table = 1 in FILE:1: expected a table, not int"),
        ('names = "a"', "names = 'a' in FILE:1: expected a list, not str"),
        ("names = [1]", "names = 1 in FILE:1: expected a string, not int"),
        ("inner = 3", "inner = 3 in FILE:1: expected a section [inner], not int"),
        ("optim = 3", "optim = 3 in FILE:1: expected a section with a 'kind', not int"),
        ('inner.size = "8 MX"', "inner.size in FILE:1: unknown unit in '8 MX'; use one of "),
        ('optim.kind = "sdg"', "FILE:1: unknown optim 'sdg'; did you mean 'sgd'? (known: adam, sgd)"),
        ("optim.lr = -1", "[optim] in FILE: lr = -1.0: must be positive"),
    ],
)
def test_a_wrong_value_says_what_where_and_what_is_expected(line: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, line + "\n")
    with pytest.raises(UserError) as caught:
        load_config(Root, path)
    assert str(caught.value).startswith(message.replace("FILE", str(path)))


def test_a_sections_own_check_names_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, "\n\n[optim]\nlr = -1\n")
    with pytest.raises(UserError) as caught:
        load_config(Root, path)
    assert str(caught.value) == f"[optim] in {path}:3: lr = -1.0: must be positive"


def test_missing_file_suggests_the_near_one(tmp_path: Path) -> None:
    write(tmp_path, "")
    with pytest.raises(UserError) as caught:
        load_config(Root, tmp_path / "rum.toml")
    expected = f"no configuration file {tmp_path}/rum.toml; did you mean '{tmp_path}/run.toml'?"
    assert str(caught.value) == expected
    with pytest.raises(UserError, match="no configuration file /nowhere/at/all.toml$"):
        load_config(Root, "/nowhere/at/all.toml")


def test_a_folder_and_bad_bytes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"cannot read the configuration file {tmp_path}"):
        load_config(Root, tmp_path)
    path = tmp_path / "latin.toml"
    path.write_bytes(b'name = "caf\xe9"\n')
    with pytest.raises(UserError, match=f"cannot read the configuration file {path}: .*utf-8"):
        load_config(Root, path)


def test_bad_toml_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "name = 'a'\nflag = maybe\n")
    with pytest.raises(UserError, match=rf"{path} is not valid TOML: .*line 2"):
        load_config(Root, path)


@pytest.mark.parametrize("text", ["name", "=3", "a b=3", "inner..steps=3", "inner.=3"])
def test_an_override_without_a_key_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="cannot read the override '.*'; write section.key=value"):
        load_config(Root, None, [text])


def test_an_override_cannot_go_into_a_value(tmp_path: Path) -> None:
    path = write(tmp_path, "name = 'a'\n")
    with pytest.raises(UserError, match="override 'name.first=1': 'name' is a value, not a section"):
        load_config(Root, path, ["name.first=1"])


def test_overrides_come_after_the_file_and_the_last_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "name = 'file'\n[inner]\nsteps = 1\nsize = 2\n")
    config = load_config(Root, path, ["inner.steps=5", "inner.steps=2k", "name=typed"])
    assert (config.name, config.inner.steps, config.inner.size) == ("typed", 2000, 2)


def test_overrides_are_toml_or_bare_words() -> None:
    words = [
        "flag=true",
        "maybe=3",
        "length=2k steps",
        "mode=slow",
        'names=["a","b"]',
        "table={a=1}",
        "inner.size=8 MiB",
    ]
    config = load_config(Root, None, words)
    assert (config.flag, config.maybe, config.length, config.mode) == (True, 3, Duration(2000, "steps"), "slow")
    assert (config.names, config.table, config.inner.size) == (["a", "b"], {"a": 1}, 2**23)


@pytest.mark.parametrize("text", ["12:00:00", "2026-01-02", "2026-01-02T03:04:05Z"])
def test_times_are_words(text: str) -> None:
    assert load_config(Root, None, [f"name={text}"]).name == text


def test_overriding_kind_clears_its_section(tmp_path: Path) -> None:
    path = write(tmp_path, '[optim]\nkind = "sgd"\nmomentum = 0.5\nlr = 0.2\n')
    config = load_config(Root, path, ["optim.kind=adam"])
    assert config.optim == Adam()
    same = load_config(Root, path, ["optim.kind=sgd"])
    assert same.optim == Sgd(momentum=0.5, lr=0.2)


@pytest.mark.parametrize("order", [["optim.lr=0.3", "optim.kind=adam"], ["optim.kind=adam", "optim.lr=0.3"]])
def test_kind_never_undoes_another_override(order: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, '[optim]\nkind = "sgd"\nmomentum = 0.5\n')
    assert load_config(Root, path, order).optim == Adam(lr=0.3)


def test_integers_are_fine_for_numbers_but_not_the_reverse() -> None:
    assert load_config(Root, None, ["optim.lr=1"]).optim.lr == 1.0
    with pytest.raises(UserError, match="inner.steps = 1.0"):
        load_config(Root, None, ["inner.steps=1.0"])


def test_sections_are_frozen_and_defaults_are_not_shared() -> None:
    first, second = Root(), Root()
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.name = "b"  # type: ignore[misc]
    assert first.names is not second.names and first.table is not second.table


def test_explain_lists_every_key_with_its_help() -> None:
    rows = list(explain(Root(maybe=None, length=Duration(3, "tokens"))))
    assert ("optim.momentum", "0.9", "of the running gradient") in rows
    assert ("[inner]", "", "a nested section") in rows
    assert ("maybe", "unset", "may be unset") in rows
    assert ("length", '"3 tokens"', "a duration") in rows
    assert all(help for _, _, help in rows)


def test_every_key_of_a_run_has_help() -> None:
    assert [key for key, _, help in explain(PretrainConfig()) if not help] == []


texts = st.text(max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False)
durations = st.builds(Duration, st.integers(0, 10**15), st.sampled_from(["steps", "tokens", "epochs", "s"]))
optimizers = st.one_of(
    st.builds(Sgd, lr=st.floats(1e-12, 1e12), momentum=numbers), st.builds(Adam, lr=numbers, betas=st.lists(numbers))
)
roots = st.builds(
    Root,
    name=texts,
    flag=st.booleans(),
    mode=st.sampled_from(["fast", "slow"]),
    maybe=st.none() | st.integers(-(2**62), 2**62),
    length=durations,
    table=st.dictionaries(texts, st.integers(-9, 9) | texts | st.lists(st.booleans()), max_size=3),
    names=st.lists(texts, max_size=3),
    optim=optimizers,
    inner=st.builds(Inner, size=st.integers(0, 2**62), steps=st.integers(0, 2**62)),
)


@given(roots)
def test_toml_round_trip(tmp_path_factory: pytest.TempPathFactory, config: Root) -> None:
    path = tmp_path_factory.getbasetemp() / "round.toml"
    path.write_text(to_toml(config), encoding="utf-8", newline="")
    assert load_config(Root, path) == config


def test_the_whole_configuration_of_a_run_survives_toml(tmp_path: Path) -> None:
    overrides = ["optim.lr=3e-4", "schedule.kind=cosine", "model.config={hidden_size=64}", "checkpoint.every=10 min"]
    config = load_config(PretrainConfig, None, overrides)
    path = write(tmp_path, to_toml(config))
    assert load_config(PretrainConfig, path) == config
    assert config.checkpoint.every == Duration(600, "s")


def test_a_table_is_passed_through_unchanged() -> None:
    table = {"a": [1, 2], "b": {"c": True}}
    assert build(Root, {"table": table}, Source()).table == table
    assert to_dict(build(Root, {"table": table}))["table"] == table


def test_secrets_are_never_part_of_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "s3cr3t-" + "x" * 30
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)
    config = load_config(PretrainConfig, None, ["track.wandb=online"])
    assert secret not in to_toml(config)
    keys = [key.lower() for key, _, _ in explain(config)]
    assert [k for k in keys if any(word in k.split(".")[-1] for word in ("api_key", "secret", "password"))] == []
    assert os.environ["WANDB_API_KEY"] == secret
