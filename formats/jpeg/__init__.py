"""JPEG files as bytes: headers, entropy-coded scans, lossless restart markers, and cutting out crop windows."""
