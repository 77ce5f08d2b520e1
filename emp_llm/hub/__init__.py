"""The Hugging Face Hub: models that come from it and folders that go to it.

hub_library      what is used of huggingface_hub beyond its types
download_errors  what a download was refused for, in one line
upload_errors    what an upload was refused for, in one line
destination      the repository that an upload goes to
download_report  how far a download is
cached_files     files of the cache, deleted when they are done with
remote_file      byte ranges of one file
repository       a repository in the Hub's cache
ranges           targets read by ranges, nothing kept
arrivals         shards worked on as they arrive
source           a model by name: a folder or a repository
"""
