"""`make demo`: the whole chain, on text that every machine has."""

if __name__ != "millrace.launch.demo":
    raise ImportError(
        f"import millrace.launch.demo, not {__name__}: a bare import would load a second copy with a second registry"
    )
