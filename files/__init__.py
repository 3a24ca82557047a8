"""Bytes on disk to arrays and back; nothing here knows a model or a flag.

Read `atomic_io` (how every file is written), `data_folder` (a data folder's bytes) and its
`data_writer`, then `features` and `item_vectors`, and last `checkpoint`.
"""
