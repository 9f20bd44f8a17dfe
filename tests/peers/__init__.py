"""Other public normalizing flows, timed beside ours at equal FLOPs.

Each peer has one file, whose functions `train_step` and `inverse` build its own model at given
sizes. Nothing of a peer is part of this package: its checkout lies in a folder that the user names.
"""

from tests.peers.work import Peer

OURS = Peer("ntm_jax", "tests.peers.ours")
PEERS = (  # beside ours, in the order of the table
    Peer("ml-tarflow", "tests.peers.tarflow", "https://github.com/apple/ml-tarflow",
         packages=("torch",)),
    Peer("ml-starflow", "tests.peers.starflow",
         "https://github.com/apple/ml-starflow", packages=("torch", "einops", "tqdm")),
    Peer("big_vision", "tests.peers.jet",
         "https://github.com/google-research/big_vision", packages=("einops",)),
    Peer("GenSBI", "tests.peers.gensbi", "https://github.com/aurelio-amerio/GenSBI",
         packages=("einops",), source="src"),
)
