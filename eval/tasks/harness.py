"""The bridge to lm-eval, on local task files only."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from millrace.core.errors import UserError
from millrace.core.registry import lookup
from millrace.eval.subject import Subject
from millrace.eval.tasks import REGISTRY
from millrace.eval.tasks.base import TaskFile

YAML = (".yaml", ".yml")


def run_tasks(
    subject: Subject, paths: Sequence[str], *, batch: int = 8, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluate every task of `paths`, without a network.

    Args:
        paths: task files (`FILE` or `KIND=FILE`), folders of them, and files or folders of lm-eval's own YAML tasks.
        limit: the first so many documents of each task.

    Returns:
        By task: {"kind", "path", "samples", "metrics": {name: {"value", "stderr"}}}.

    Raises:
        UserError: lm-eval is not installed, or a task that cannot be read.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks need lm-eval, which is not installed: pip install millrace[eval]")
    files, folders = find_tasks(paths)
    with _offline():
        from millrace.eval.tasks.model import SubjectLM

        tasks, about = _load(files, folders)
        found = _evaluate(tasks, SubjectLM(subject, batch), limit)
    return {
        name: {
            **about.get(name, {"kind": "lm-eval", "path": None}),
            "samples": found["n-samples"].get(name, {}).get("effective"),
            "metrics": _metrics(values),
        }
        for name, values in found["results"].items()
    }


def _evaluate(tasks: list[Any], lm: Any, limit: int | None) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    # lm-eval's description of the machine takes ten seconds of asking other programs; the result has its own.
    with mock.patch("lm_eval.evaluator.add_env_info"), mock.patch("lm_eval.evaluator.get_git_commit_hash"):
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
        )
    assert found is not None  # only on ranks other than 0
    return dict(found)


def find_tasks(paths: Sequence[str]) -> tuple[list[TaskFile], list[Path]]:
    """(our task files, lm-eval's YAML files and folders) that `paths` name.

    Raises:
        UserError: nothing there, or two tasks of one name.
    """
    files: list[TaskFile] = []
    theirs: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            lines = sorted(p for p in path.iterdir() if p.suffix == ".jsonl")
            has_yaml = any(p.suffix in YAML for p in path.rglob("*"))
            if not lines and not has_yaml:
                raise UserError(
                    f"the folder {path} holds no task: neither JSON lines (.jsonl) nor lm-eval's YAML files"
                )
            # Beside YAML files, JSON lines are those tasks' data.
            files += [] if has_yaml else [TaskFile.parse(str(p)) for p in lines]
            theirs += [path] if has_yaml else []
        elif path.suffix in YAML and path.is_file():
            theirs.append(path)
        else:
            files.append(TaskFile.parse(name))
    names = [file.name for file in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two task files are called {twice[0]}.jsonl; rename one, results are by name")
    return files, theirs


def _load(files: list[TaskFile], theirs: list[Path]) -> tuple[list[Any], dict[str, dict[str, Any]]]:
    """lm-eval's tasks, and what is known about them by name."""
    tasks, about = [], {}
    for file in files:
        tasks.append(_task(file))
        about[file.name] = {"kind": file.kind, "path": str(file.path)}
    for path in theirs:
        for task in _load_yaml(path):
            name = getattr(task, "task_name", None) or task.name
            if name in about:
                raise UserError(f"two tasks are called {name}; rename one, results are by name")
            tasks.append(task)
            about[name] = {"kind": "lm-eval", "path": str(path)}
    return tasks, about


def _task(file: TaskFile) -> Any:
    import datasets
    from lm_eval.api.task import ConfigurableTask

    documents = datasets.Dataset.from_list(file.documents())
    settings = {
        **lookup(REGISTRY, file.kind, "kind of task").settings,
        "task": file.name,
        "test_split": "test",
        # Our own reading, not `dataset_path: json`: it names the line that is wrong and fills no cache.
        "custom_dataset": lambda **_: {"test": documents},
    }
    return ConfigurableTask(config=settings)


def _load_yaml(path: Path) -> list[Any]:
    """Tasks and groups of a folder (or one file) of lm-eval's YAML; relative data files are relative to the folder."""
    from lm_eval.tasks import TaskManager

    folder = path if path.is_dir() else path.parent
    try:
        with contextlib.chdir(folder):
            manager = TaskManager(include_path=".", include_defaults=False)
            inside = {name for name in manager.all_groups if path.is_dir()}
            names = sorted(inside) or (manager.all_subtasks if path.is_dir() else [path.name])
            loaded = manager.load(list(names))
            if inside:  # tasks that no group holds
                rest = [name for name in manager.all_subtasks if name not in loaded["tasks"]]
                loaded["tasks"] |= manager.load(rest)["tasks"] if rest else {}
            return [*loaded["groups"].values()] + [t for n, t in loaded["tasks"].items() if not _in(n, loaded)]
    except UserError:
        raise
    except Exception as error:  # whatever lm-eval, datasets and people's own functions raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"lm-eval cannot load the tasks of {path}: {reason} (nothing is downloaded: data_files must be local)"
        ) from None


def _in(name: str, loaded: Any) -> bool:
    return any(name in (task.task_name for task in group.get_all_tasks()) for group in loaded["groups"].values())


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """{"acc": {"value", "stderr"}} from lm-eval's {"acc,none": …, "acc_stderr,none": …}."""
    metrics: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        name, _, how = key.partition(",")
        if isinstance(value, int | float) and how and not name.endswith("_stderr"):
            error = values.get(f"{name}_stderr,{how}")
            label = name if how == "none" else f"{name} ({how})"
            metrics[label] = {"value": float(value), "stderr": error if isinstance(error, float) else None}
    return metrics


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """No network, no processes of lm-eval's own, and its prints on stderr: stdout is for results."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "DISABLE_MULTIPROC": "1"}
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, quiet))
        import datasets
        import huggingface_hub.constants

        # Both have read the environment when they were imported.
        stack.enter_context(mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
        stack.enter_context(mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield
