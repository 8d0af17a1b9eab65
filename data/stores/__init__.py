"""Stores: where shards lie, one file each."""

if __name__ != "millrace.data.stores":
    raise ImportError(
        f"import millrace.data.stores, not {__name__}: a bare import would load a second copy with a second registry"
    )
