"""What samples hold beside text and tokens, one file each."""

if __name__ != "millrace.data.modalities":
    raise ImportError(f"import millrace.data.modalities, not {__name__}: a bare import would load a second copy of it")
