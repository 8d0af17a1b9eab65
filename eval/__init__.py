"""What a checkpoint can do: bits per byte, tasks, generation, reports."""

if __name__ != "millrace.eval":
    raise ImportError(
        f"import millrace.eval, not {__name__}: a bare import would load a second copy with a second registry"
    )
