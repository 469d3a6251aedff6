"""Sockets, threads and order: how calls reach the API."""
