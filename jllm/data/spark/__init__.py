"""What the Spark jobs are made of, beside what the local commands call.

Files on any file system of Hadoop (`files`), the output folder and who works there (`place`, `claim`), which files an
input names (`sources`), the work of a task (`encoding`) and what it found (`findings`), shards (`shards`), the session
(`session`), and errors of Spark as one line (`failures`, `worker_errors`).

May import all of `jllm.data`. Nothing here decides what a local command decides too: that is called where it lies."""
