"""`make demo`: the whole chain, on text, pictures and sounds that every machine can make."""

if __name__ != "millrace.launch.demo":
    raise ImportError(
        f"import millrace.launch.demo, not {__name__}: a bare import would load a second copy with a second registry"
    )
