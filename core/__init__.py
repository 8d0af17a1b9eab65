"""What every part may know: configuration, errors, units, run directory, ledger. Imports no torch."""

if __name__ != "millrace.core":
    raise ImportError(
        f"import millrace.core, not {__name__}: a bare import would load a second copy with a second registry"
    )
