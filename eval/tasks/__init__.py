"""Evaluation tasks, one file each."""

if __name__ != "millrace.eval.tasks":
    raise ImportError(
        f"import millrace.eval.tasks, not {__name__}: a bare import would load a second copy with a second registry"
    )
