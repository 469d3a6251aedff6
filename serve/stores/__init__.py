"""The databases behind `serve.stores.base.EventStore`."""
