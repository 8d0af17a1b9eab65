"""From bytes anywhere to batches on this rank."""

if __name__ != "millrace.data":
    raise ImportError(
        f"import millrace.data, not {__name__}: a bare import would load a second copy with a second registry"
    )

# A source reads one shard in place. The kind is stored per shard in a manifest, so kinds may be mixed.
SOURCES = {
    "arrow": "millrace.data.sources.arrow:ArrowSource",
    "folder": "millrace.data.sources.folder:FolderSource",
    "jsonl": "millrace.data.sources.jsonl:JsonlSource",
    "jsonl.gz": "millrace.data.sources.compressed:JsonlGzSource",
    "jsonl.zst": "millrace.data.sources.compressed:JsonlZstSource",
    "mds": "millrace.data.sources.mds:MdsSource",
    "megatron": "millrace.data.sources.megatron:MegatronSource",
    "parquet": "millrace.data.sources.parquet:ParquetSource",
    "tar": "millrace.data.sources.tar:TarSource",
    "text": "millrace.data.sources.text:TextSource",
}

# What samples hold beside text and tokens, by role.
MODALITIES = {
    "image": "millrace.data.modalities.image:ImageModality",
    "audio": "millrace.data.modalities.audio:AudioModality",
    "image_codes": "millrace.data.modalities.codes:CodesModality",
    "audio_codes": "millrace.data.modalities.codes:CodesModality",
}

# Which role the codes of a medium have.
CODES = {"image": "image_codes", "audio": "audio_codes"}

# A store opens a blob by its URL; the key is the URL's scheme.
STORES = {
    "file": "millrace.data.stores.local:LocalBlob",
    "s3": "millrace.data.stores.remote:ObjectBlob",
    "gs": "millrace.data.stores.remote:ObjectBlob",
    "az": "millrace.data.stores.remote:ObjectBlob",
    "http": "millrace.data.stores.http:HttpBlob",
    "https": "millrace.data.stores.http:HttpBlob",
    "hf": "millrace.data.stores.hub:HubBlob",
}
