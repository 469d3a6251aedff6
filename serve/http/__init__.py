"""The second door: HTTP and JSON in front of the gRPC server of the same process."""
