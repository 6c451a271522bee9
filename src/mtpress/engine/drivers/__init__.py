"""Programs that run under the python of another environment and answer one request after another."""
