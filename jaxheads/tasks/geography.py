"""Countries, their capitals, and cities that are nobody's capital.

Countries whose capital or seat of government is split or disputed are left out, so
that "capital" and "seat of government" always have the same single answer. So are
city states, whose capital shares the country's name. No city of `CITIES` is the
capital of any country, so no imagined answer is true somewhere else.
"""

from collections.abc import Mapping
from types import MappingProxyType

CAPITALS: Mapping[str, str] = MappingProxyType(
    {
        "Albania": "Tirana",
        "Algeria": "Algiers",
        "Angola": "Luanda",
        "Argentina": "Buenos Aires",
        "Armenia": "Yerevan",
        "Australia": "Canberra",
        "Austria": "Vienna",
        "Azerbaijan": "Baku",
        "Bangladesh": "Dhaka",
        "Belarus": "Minsk",
        "Belgium": "Brussels",
        "Botswana": "Gaborone",
        "Brazil": "Brasilia",
        "Bulgaria": "Sofia",
        "Cambodia": "Phnom Penh",
        "Cameroon": "Yaounde",
        "Canada": "Ottawa",
        "China": "Beijing",
        "Colombia": "Bogota",
        "Croatia": "Zagreb",
        "Cuba": "Havana",
        "Cyprus": "Nicosia",
        "Denmark": "Copenhagen",
        "Ecuador": "Quito",
        "Egypt": "Cairo",
        "Estonia": "Tallinn",
        "Ethiopia": "Addis Ababa",
        "Finland": "Helsinki",
        "France": "Paris",
        "Georgia": "Tbilisi",
        "Germany": "Berlin",
        "Ghana": "Accra",
        "Greece": "Athens",
        "Hungary": "Budapest",
        "Iceland": "Reykjavik",
        "India": "New Delhi",
        "Indonesia": "Jakarta",
        "Iran": "Tehran",
        "Iraq": "Baghdad",
        "Ireland": "Dublin",
        "Italy": "Rome",
        "Jamaica": "Kingston",
        "Japan": "Tokyo",
        "Jordan": "Amman",
        "Kenya": "Nairobi",
        "Latvia": "Riga",
        "Lebanon": "Beirut",
        "Lithuania": "Vilnius",
        "Mongolia": "Ulaanbaatar",
        "Morocco": "Rabat",
        "Mozambique": "Maputo",
        "Nepal": "Kathmandu",
        "Nigeria": "Abuja",
        "Norway": "Oslo",
        "Pakistan": "Islamabad",
        "Peru": "Lima",
        "Philippines": "Manila",
        "Poland": "Warsaw",
        "Portugal": "Lisbon",
        "Romania": "Bucharest",
        "Russia": "Moscow",
        "Senegal": "Dakar",
        "Serbia": "Belgrade",
        "Slovakia": "Bratislava",
        "Somalia": "Mogadishu",
        "Spain": "Madrid",
        "Sweden": "Stockholm",
        "Switzerland": "Bern",
        "Thailand": "Bangkok",
        "Turkey": "Ankara",
        "Ukraine": "Kyiv",
        "Vietnam": "Hanoi",
    }
)
"""Capital of each country, both in plain ASCII."""

CITIES: tuple[str, ...] = (
    "Adelaide", "Aleppo", "Auckland", "Austin", "Baltimore", "Barcelona", "Basra",
    "Birmingham", "Bologna", "Boston", "Brisbane", "Bristol", "Buffalo", "Calgary",
    "Cambridge", "Charlotte", "Chicago", "Cleveland", "Cologne", "Columbus", "Dallas", "Davao",
    "Denver", "Detroit", "Dresden", "Dubai", "Florence", "Frankfurt", "Geneva", "Genoa",
    "Glasgow", "Granada", "Guangzhou", "Halifax", "Hamburg", "Hiroshima", "Honolulu",
    "Houston", "Istanbul", "Johannesburg", "Karachi", "Kobe", "Krakow", "Kyoto", "Lagos",
    "Lahore", "Leeds", "Leipzig", "Liverpool", "Louisville", "Lyon", "Manchester", "Medina",
    "Melbourne", "Memphis", "Miami", "Milan", "Milwaukee", "Minneapolis", "Montreal", "Mumbai",
    "Munich", "Nagoya", "Naples", "Nashville", "Newcastle", "Nice", "Nottingham", "Oakland",
    "Omaha", "Orlando", "Osaka", "Oxford", "Palermo", "Perth", "Philadelphia", "Phoenix",
    "Pittsburgh", "Portland", "Porto", "Sacramento", "Salzburg", "Seattle", "Seville",
    "Shanghai", "Sheffield", "Sydney", "Tampa", "Toronto", "Tucson", "Turin", "Vancouver",
    "Venice", "Verona", "Winnipeg", "Zurich",
)  # fmt: skip
"""Cities that are not the capital of any country, in alphabetical order.

For SmolLM2 no two of them, nor a city and a capital above, begin with the same token.
"""
