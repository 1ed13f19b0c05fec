"Two processes as a launcher starts them on CPUs."
import os
import socket


def join_group(rank, port):
    "Make this process one of the two: what a launcher puts into its environment."
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}


def run_two(context, target, *args, seconds=60):
    "Call a function of rank, port and further arguments in two processes, which have to end well."
    with socket.socket() as free: free.bind(("127.0.0.1", 0)); port = free.getsockname()[1]
    group = [context.Process(target=target, args=(rank, port, *args)) for rank in (0, 1)]
    for process in group: process.start()
    for process in group: process.join(seconds)
    assert [process.exitcode for process in group] == [0, 0]
