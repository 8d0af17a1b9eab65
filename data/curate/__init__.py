"""Curation: which documents of a corpus are worth training on, and a report of the others."""

if __name__ != "millrace.data.curate":
    raise ImportError(
        f"import millrace.data.curate, not {__name__}: a bare import would load a second copy with a second registry"
    )
