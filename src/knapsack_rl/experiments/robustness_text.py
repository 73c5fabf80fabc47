"""stub"""
RECORDED = "recorded run"
WINDOW, SAMPLED = "window (rewards)", "fresh rewards"
DISCOUNT, PRIOR = "discount per visit", "prior (pseudo-rewards)"
DELAY, LOGITS = "outcomes late (epochs)", "noise on the true rate (logits)"
figure=findings=paragraph=None
