"""The databases behind `serve.store.EventStore`."""
