"""Recommendations for everybody of a log from an exported model, without a server.

The log is read once by the code of `jaxrec prepare`, sorted by user, and cut into parts. Each part is answered by
itself with the engine of `serve`, and written whole or not at all. The parts depend on the log alone, so that neither
the number of workers nor an interruption changes a digit.

    requests   for whom, and when
    scoring    the answers of a part
    job        what is finished, in a folder that survives a kill
    local      a log of any form, processes of one machine, CSV out
    cluster    a folder of Parquet, workers of Dask, a folder of Parquet out
"""
