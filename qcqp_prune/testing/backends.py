def check_backend(): pass
