"""Objectives: modules whose forward returns the summed loss."""

if __name__ != "millrace.pretrain.objectives":
    raise ImportError(
        f"import millrace.pretrain.objectives, not {__name__}: a bare import would load a second copy with a second registry"
    )
