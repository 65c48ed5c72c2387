"""Store, analyse, forecast, alert. Never imports torch."""
