"""Fact tables about places: American states, Canadian provinces and countries, each with cities that lie in it.

One line per place: name | capital | code | largest city | region | language | currency | cities. Languages and
currencies are asked of countries only. A city that is also somebody's capital is dropped from the city lists when the
tables are read, so that every city name in a two-hop question has one answer.
"""

from __future__ import annotations

from dataclasses import dataclass

_STATES = """
Alabama|Montgomery|AL|Huntsville|South|Birmingham,Mobile,Tuscaloosa,Dothan
Alaska|Juneau|AK|Anchorage|West|Fairbanks,Sitka,Ketchikan,Kodiak
Arizona|Phoenix|AZ|Phoenix|West|Tucson,Mesa,Tempe,Flagstaff
Arkansas|Little Rock|AR|Little Rock|South|Fayetteville,Jonesboro,Texarkana,Conway
California|Sacramento|CA|Los Angeles|West|Oakland,Fresno,Hollywood,Pasadena,Anaheim,Berkeley,Stockton
Colorado|Denver|CO|Denver|West|Boulder,Aspen,Pueblo,Durango
Connecticut|Hartford|CT|Bridgeport|Northeast|Stamford,Waterbury,Norwalk,Danbury
Delaware|Dover|DE|Wilmington|South|Georgetown,Lewes,Smyrna,Milford
Florida|Tallahassee|FL|Jacksonville|South|Miami,Orlando,Tampa,Naples
Georgia|Atlanta|GA|Atlanta|South|Savannah,Macon,Valdosta,Marietta
Hawaii|Honolulu|HI|Honolulu|West|Hilo,Kailua,Lahaina,Waipahu
Idaho|Boise|ID|Boise|West|Nampa,Pocatello,Rexburg,Meridian
Illinois|Springfield|IL|Chicago|Midwest|Peoria,Rockford,Naperville,Joliet
Indiana|Indianapolis|IN|Indianapolis|Midwest|Gary,Evansville,Bloomington,Muncie
Iowa|Des Moines|IA|Des Moines|Midwest|Dubuque,Davenport,Waterloo,Ames
Kansas|Topeka|KS|Wichita|Midwest|Lawrence,Salina,Olathe,Emporia
Kentucky|Frankfort|KY|Louisville|South|Lexington,Paducah,Covington,Owensboro
Louisiana|Baton Rouge|LA|New Orleans|South|Shreveport,Lafayette,Monroe,Metairie
Maine|Augusta|ME|Portland|Northeast|Bangor,Lewiston,Bath,Biddeford
Maryland|Annapolis|MD|Baltimore|South|Bethesda,Rockville,Frederick,Salisbury
Massachusetts|Boston|MA|Boston|Northeast|Worcester,Lowell,Cambridge,Plymouth
Michigan|Lansing|MI|Detroit|Midwest|Flint,Kalamazoo,Dearborn,Saginaw
Minnesota|Saint Paul|MN|Minneapolis|Midwest|Duluth,Rochester,Mankato,Bemidji
Mississippi|Jackson|MS|Jackson|South|Biloxi,Tupelo,Natchez,Gulfport
Missouri|Jefferson City|MO|Kansas City|Midwest|Branson,Hannibal,Joplin,Sedalia
Montana|Helena|MT|Billings|West|Missoula,Bozeman,Butte,Kalispell
Nebraska|Lincoln|NE|Omaha|Midwest|Kearney,Hastings,Bellevue,Fremont
Nevada|Carson City|NV|Las Vegas|West|Reno,Henderson,Elko,Sparks
New Hampshire|Concord|NH|Manchester|Northeast|Nashua,Keene,Portsmouth,Laconia
New Jersey|Trenton|NJ|Newark|Northeast|Hoboken,Camden,Princeton,Paterson
New Mexico|Santa Fe|NM|Albuquerque|West|Roswell,Taos,Gallup,Carlsbad
New York|Albany|NY|New York|Northeast|Buffalo,Brooklyn,Syracuse,Yonkers
North Carolina|Raleigh|NC|Charlotte|South|Durham,Greensboro,Asheville,Gastonia
North Dakota|Bismarck|ND|Fargo|Midwest|Minot,Dickinson,Williston,Jamestown
Ohio|Columbus|OH|Columbus|Midwest|Cleveland,Cincinnati,Toledo,Akron
Oklahoma|Oklahoma City|OK|Oklahoma City|South|Tulsa,Norman,Lawton,Edmond
Oregon|Salem|OR|Portland|West|Eugene,Bend,Medford,Corvallis
Pennsylvania|Harrisburg|PA|Philadelphia|Northeast|Pittsburgh,Scranton,Allentown,Erie
Rhode Island|Providence|RI|Providence|Northeast|Warwick,Cranston,Newport,Pawtucket
South Carolina|Columbia|SC|Charleston|South|Greenville,Spartanburg,Sumter,Florence
South Dakota|Pierre|SD|Sioux Falls|Midwest|Aberdeen,Deadwood,Brookings,Yankton
Tennessee|Nashville|TN|Nashville|South|Memphis,Knoxville,Chattanooga,Clarksville
Texas|Austin|TX|Houston|South|Dallas,Amarillo,Lubbock,Waco,Laredo,Galveston
Utah|Salt Lake City|UT|Salt Lake City|West|Provo,Ogden,Moab,Logan
Vermont|Montpelier|VT|Burlington|Northeast|Rutland,Stowe,Brattleboro,Bennington
Virginia|Richmond|VA|Virginia Beach|South|Norfolk,Arlington,Alexandria,Roanoke
Washington|Olympia|WA|Seattle|West|Tacoma,Spokane,Yakima,Redmond
West Virginia|Charleston|WV|Charleston|South|Huntington,Wheeling,Morgantown,Beckley
Wisconsin|Madison|WI|Milwaukee|Midwest|Racine,Oshkosh,Kenosha,Appleton
Wyoming|Cheyenne|WY|Cheyenne|West|Casper,Laramie,Cody,Gillette
"""

_PROVINCES = """
Alberta|Edmonton|AB|Calgary|West|Banff,Jasper,Leduc,Lethbridge
Ontario|Toronto|ON|Toronto|East|Hamilton,Windsor,Kingston,Sudbury
Quebec|Quebec City|QC|Montreal|East|Laval,Gatineau,Sherbrooke,Saguenay
Manitoba|Winnipeg|MB|Winnipeg|West|Brandon,Churchill,Selkirk,Thompson
Saskatchewan|Regina|SK|Saskatoon|West|Estevan,Yorkton,Weyburn,Melfort
"""

_COUNTRIES = """
France|Paris|FRA|Paris|Europe|French|euro|Lyon,Marseille,Nice,Toulouse,Bordeaux
Germany|Berlin|DEU|Berlin|Europe|German|euro|Munich,Hamburg,Cologne,Dresden
Spain|Madrid|ESP|Madrid|Europe|Spanish|euro|Barcelona,Seville,Valencia,Bilbao
Italy|Rome|ITA|Rome|Europe|Italian|euro|Milan,Venice,Turin,Bologna
England|London|GBR|London|Europe|English|pound|Liverpool,Leeds,Bristol,Sheffield
Japan|Tokyo|JPN|Tokyo|Asia|Japanese|yen|Osaka,Kyoto,Nagoya,Sapporo
China|Beijing|CHN|Shanghai|Asia|Chinese|yuan|Shenzhen,Wuhan,Chengdu,Nanjing
India|Delhi|IND|Mumbai|Asia|Hindi|rupee|Chennai,Kolkata,Jaipur,Pune
Russia|Moscow|RUS|Moscow|Europe|Russian|ruble|Kazan,Omsk,Sochi,Murmansk
Brazil|Brasilia|BRA|Sao Paulo|America|Portuguese|real|Recife,Salvador,Manaus,Curitiba
Portugal|Lisbon|PRT|Lisbon|Europe|Portuguese|euro|Porto,Braga,Faro,Coimbra
Egypt|Cairo|EGY|Cairo|Africa|Arabic|pound|Giza,Luxor,Aswan,Suez
Kenya|Nairobi|KEN|Nairobi|Africa|Swahili|shilling|Mombasa,Kisumu,Nakuru,Eldoret
Turkey|Ankara|TUR|Istanbul|Asia|Turkish|lira|Izmir,Antalya,Bursa,Konya
Greece|Athens|GRC|Athens|Europe|Greek|euro|Patras,Corinth,Heraklion,Larissa
Poland|Warsaw|POL|Warsaw|Europe|Polish|zloty|Krakow,Gdansk,Lodz,Poznan
Sweden|Stockholm|SWE|Stockholm|Europe|Swedish|krona|Malmo,Uppsala,Lund,Gothenburg
Norway|Oslo|NOR|Oslo|Europe|Norwegian|krone|Bergen,Trondheim,Tromso,Stavanger
Canada|Ottawa|CAN|Toronto|America|English|dollar|Vancouver,Halifax,Victoria,Kelowna
Australia|Canberra|AUS|Sydney|Oceania|English|dollar|Melbourne,Perth,Brisbane,Hobart
Vietnam|Hanoi|VNM|Saigon|Asia|Vietnamese|dong|Hue,Danang,Haiphong,Dalat
Thailand|Bangkok|THA|Bangkok|Asia|Thai|baht|Phuket,Pattaya,Krabi,Ayutthaya
Korea|Seoul|KOR|Seoul|Asia|Korean|won|Busan,Incheon,Daegu,Ulsan
Syria|Damascus|SYR|Damascus|Asia|Arabic|pound|Aleppo,Homs,Palmyra,Latakia
Peru|Lima|PER|Lima|America|Spanish|sol|Cusco,Arequipa,Trujillo,Iquitos
Argentina|Buenos Aires|ARG|Buenos Aires|America|Spanish|peso|Rosario,Mendoza,Cordoba,Salta
"""


@dataclass(frozen=True, slots=True)
class Place:
    """A state, province or country.

    ``kind`` is ``"state"``, ``"province"`` or ``"country"``; ``relations`` maps a relation's wording to its answer.
    """

    name: str
    kind: str
    region: str
    relations: dict[str, str]
    cities: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class City:
    """A city that is nobody's capital, and the place that contains it."""

    name: str
    place: Place


def _read(table: str, kind: str) -> list[Place]:
    """Places of one table."""
    places = []
    for line in table.strip().splitlines():
        name, capital, code, largest, region, *rest = line.split("|")
        relations = {"capital": capital, "code": code, "largest city": largest}
        if kind == "country":
            relations |= {"continent": region, "language": rest[0], "currency": rest[1]}
        else:
            relations["region"] = region
        places.append(Place(name, kind, region, relations, tuple(rest[-1].split(","))))
    return places


def load_places() -> tuple[list[Place], list[City]]:
    """All places, and all cities with the one place that contains each.

    A name that is also a capital, a place or somebody's largest city is not used as a city of another place.
    """
    places = _read(_STATES, "state") + _read(_PROVINCES, "province") + _read(_COUNTRIES, "country")
    taken = {place.name for place in places} | {place.relations["capital"] for place in places}
    cities: list[City] = []
    for place in places:
        for name in place.cities:
            if name not in taken:
                taken.add(name)
                cities.append(City(name, place))
    return places, cities
