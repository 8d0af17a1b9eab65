"""A process beside every rank that ends a run which hangs, and says which rank it waits for. Imports no torch."""

if __name__ != "millrace.engine.watchdog":
    raise ImportError(f"import millrace.engine.watchdog, not {__name__}: a bare import would load a second copy")
