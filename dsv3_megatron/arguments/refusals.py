def check(args):
    pass


REFUSALS = ()
