"""Secure aggregation: the server learns the sum of the sites' vectors and nothing else about one of them.

Double masking with Shamir recovery (Bonawitz et al. 2017, arXiv:1611.04482, fig. 4, the variant against an active
server), over the complete graph of sites. Pure: bytes and arrays in, bytes and arrays out; no NVFlare, no files.

    encoding   real numbers ↔ integers of a ring, so that no sum can overflow
    masking    key streams, added block by block
    shamir     t-of-n sharing of a secret
    identity   who a site is: its provisioned key and the pinned root
    rules      how many must survive, and what a site demands
    keys       one-use keys between two parties
    messages   what the parties send, and the bytes that are signed
    client     a site's part of one session
    server     the server's part of one session
"""
