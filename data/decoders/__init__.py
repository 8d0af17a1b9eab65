"""Decoders: encoded images and sounds to arrays, one file each."""

if __name__ != "millrace.data.decoders":
    raise ImportError(
        f"import millrace.data.decoders, not {__name__}: a bare import would load a second copy with a second registry"
    )
