"""The Hugging Face Hub: models are downloaded from it, folders are uploaded to it.

hub_library      what is used of huggingface_hub beyond its types
download_errors  why a download failed, in one line
upload_errors    why an upload failed, in one line
address          addresses of models, read as ids
destination      the repository that an upload goes to
download_report  progress of a download
cached_files     files of the cache, deleted after use
remote_file      byte ranges of a file on the Hub
repository       a repository in the Hub's cache
ranges           targets read by byte ranges; nothing is kept
arrivals         shards used as soon as each is downloaded
source           a model by its name: a folder or a repository
"""
