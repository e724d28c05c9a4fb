"""HDF5 files and Zarr arrays of others, adopted as data sets without rewriting them."""
