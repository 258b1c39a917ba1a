"""What goes wrong through the user's input, told in one sentence, and the exit codes that scripts end with."""


class UserError(Exception):
    """Wrong use or bad input: what is wrong, where, and what to do. Scripts print it and exit with code 2."""


EXIT_USAGE = 2
EXIT_INTERRUPTED = 75  # stopped by a signal after saving: the same command again goes on (sysexits' "try again")
EXIT_AFTER = 74  # of a rank that ends because another has failed, which has said why
