"""Sources: formats read in place, one file each."""

if __name__ != "millrace.data.sources":
    raise ImportError(
        f"import millrace.data.sources, not {__name__}: a bare import would load a second copy with a second registry"
    )
