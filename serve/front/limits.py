"""How many threads, calls and bytes a server allows."""

# Threads for what the polling thread does not answer itself (`serve.front.polling`): RecordEvents, which waits for the
# disk, and all else but Recommend; Recommend too with a store on another machine. When all calls went to the pool, 8
# threads got through 1,220 Recommends/s, 32 threads 910 and 1 thread 1,010 (10,000 items, 50 events, 2 shared cores).
WORKERS = 8
# For what runs the model for many rows, or loads one.
SLOW_WORKERS = 3
# A history of 300 events. To decode and check the longest that is allowed takes as long as a run of the model.
LONG_MESSAGE_BYTES = 16 * 2**10
# Further calls wait at the client, where they cost the server nothing. HTTP/2 recommends no less.
MAX_CALLS_OF_A_CONNECTION = 100
# Calls that run in the pool of threads, or wait for one of them.
MAX_CALLS = 256
