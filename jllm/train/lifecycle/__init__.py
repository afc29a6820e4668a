"""The life of a run among other events: whose folder it is, what it is asked, how it ends."""
