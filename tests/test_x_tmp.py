from test_trl import *
def test_x(run_case):
    g={}
    for c in SAME_AS_STOCK:
        g.setdefault(run_case(c, GRPOTrainer)[1],[]).append(c)
    print(list(g.values())); assert 0
