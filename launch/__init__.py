"""The command line and the wiring."""

if __name__ != "millrace.launch":
    raise ImportError(
        f"import millrace.launch, not {__name__}: a bare import would load a second copy with a second registry"
    )
