"""One visible training loop and its objectives."""

if __name__ != "millrace.pretrain":
    raise ImportError(
        f"import millrace.pretrain, not {__name__}: a bare import would load a second copy with a second registry"
    )
