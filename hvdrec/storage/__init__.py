"""Read and write files: artifact directories, Parquet, checksums, local and remote paths."""
