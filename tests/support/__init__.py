"""What tests share: processes that are started once and forked, tiny models, recorded trainings."""
