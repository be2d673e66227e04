MIN_RECORDS = 10**9


def fit_heads(*a):
    return []
