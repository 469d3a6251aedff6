"""The preparation past one machine, on Dask: a directory of Parquet in, shards by user out.

Why Dask: it is Python wheels alone, where Spark needs a Java machine on every host; it starts tasks again on other
workers when one dies, as Ray does, at a tenth of Ray's size; and its clusters run on what training hosts are scheduled
with (Slurm, Kubernetes, SSH). Its own shuffle is not used: rows in a worker's memory die with the worker. Here each
task reads shared storage, writes a file of its own there, whole or not at all, and returns a few numbers, so a task
that is lost is run again and gives the same, and no task holds more than a piece of the input or one shard.

    partition   per piece of the input: check, hash users to shards, write the rows of each shard together
    sort        per shard: its rows of all pieces, by user and time, items as numbers of one global vocabulary
    count       per shard, again and again: events per item among what the filter leaves; the sums decide globally
    known       per shard, for the splits whose cases ask for it: the items that its training part has seen
    write       per shard: the prepared directory that `jaxrec.data.store.read_prepared` reads

The scratch files lie beside the output, which all workers must reach under the same path.
"""
