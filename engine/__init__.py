"""How a model is sharded, stepped and saved: Accelerate and DeepSpeed."""

if __name__ != "millrace.engine":
    raise ImportError(
        f"import millrace.engine, not {__name__}: a bare import would load a second copy with a second registry"
    )
