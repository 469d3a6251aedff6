"""The closed loop: what a server recorded becomes the next model version, or a reason why not (`jaxrec learn`)."""
