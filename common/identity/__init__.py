"""Who is who: keys, certificates, join tokens and signatures.

    files      private files: 0600 in 0700, written whole or not at all
    signing    Ed25519 keys over DSSE's pre-authentication encoding
    authority  the coordinator's certificate authority and its TLS leaf
    token      join tokens: what is handed out, what is stored, what is proved
    hello      the first connection of a worker: find the pinned authority, send nothing secret
    session    the statement that opens a session

TLS certificates are ECDSA P-256, since gRPC refuses Ed25519 there; signatures over artefacts are Ed25519.
A worker trusts the **pin**: the SHA-256 of the authority's public key as SubjectPublicKeyInfo. From the pin
follow the authority's certificate, the TLS connection, and, by endorsement, the key that signs manifests.
Names and addresses prove nothing and are never relied on.
"""
