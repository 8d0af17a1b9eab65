"""What is trained: the bridge to transformers, packing, parameter and FLOP counts.

Every causal language model that `transformers.AutoConfig.for_model` knows trains without an entry here. An
entry in `REGISTRY` records what was proven about an architecture: how the depth dial sizes it, whether
documents may be packed.
"""

if __name__ != "millrace.models":
    raise ImportError(
        f"import millrace.models, not {__name__}: a bare import would load a second copy with a second registry"
    )

# Our own models, by what the configuration of a saved one names; those of transformers need no entry.
CLASSES = {
    "Codec": "millrace.models.codec:Codec",
    "Generator": "millrace.models.generator:Generator",
    "LstmForCausalLM": "millrace.models.lstm:LstmForCausalLM",
}

# kind → an `Architecture` record; see `millrace.models.architecture`.
REGISTRY = {
    "bert": "millrace.models.architecture:ENCODER",
    "cohere": "millrace.models.architecture:GATED",
    "gemma2": "millrace.models.architecture:GEMMA2",
    "gpt2": "millrace.models.architecture:PLAIN",
    "gpt_neox": "millrace.models.architecture:PLAIN",
    "granite": "millrace.models.architecture:GATED",
    "llama": "millrace.models.architecture:GATED",
    "lstm": "millrace.models.architecture:LSTM",
    "mamba2": "millrace.models.architecture:MAMBA2",
    "mistral": "millrace.models.architecture:GATED",
    "mixtral": "millrace.models.architecture:MIXTRAL",
    "nanochat": "millrace.models.architecture:PLAIN",
    "olmo2": "millrace.models.architecture:GATED",
    "phi3": "millrace.models.architecture:GATED",
    "qwen2": "millrace.models.architecture:GATED",
    "qwen3": "millrace.models.architecture:GATED",
    "qwen3_moe": "millrace.models.architecture:QWEN3_MOE",
    "recurrent_gemma": "millrace.models.architecture:RECURRENT_GEMMA",
    "smollm3": "millrace.models.architecture:GATED",
    "starcoder2": "millrace.models.architecture:PLAIN",
    "xlstm": "millrace.models.architecture:RECURRENT",
}
