"""What runs in the template and in a task's process. Light: no grpc, no psutil, no cryptography."""
