"""The HTTP side of Megatron's server: OpenAI's endpoints over its coordinator, with what its own two do not have.

Megatron's engines, coordinator and client do the work, over several data-parallel ranks if need be. Added are two
messages, tokens as they come and the abortion of a request (`messages`), and endpoints that stream, refuse with a
reason, and push back (`app`). Packages: quart, hypercorn, pyzmq, msgpack (`pip install dsv3_megatron[serve]`).
"""
